"""The operators of FastServe: weight formats, paged attention and the small ones, on any device of torch.

`formats` holds the weights, `preparation` packs one for a device, `ops` has the functions,
`attention_metadata` what attention must know about a step, `compressed_tensors` the way to checkpoints and
back. The type of the weight picks the operator; the device of the tensor picks the implementation.
"""
