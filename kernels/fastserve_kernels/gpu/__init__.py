"""The Triton kernels. Import a module of this package only on a GPU, or to compile, interpret or tune it.

A module holds one operator: its `@triton.jit` functions, `prepare` (a weight as the kernel reads it), `plan`
(the launches for given tensors and an explicit `Config`), the function that torch's dispatcher calls, and an
`Operator` entry from which the kernels are compiled, tuned and measured.
"""
