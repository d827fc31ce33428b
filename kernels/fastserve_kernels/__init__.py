"""The operators of FastServe: weight formats, paged attention and the small ones, on any device of torch.

`formats` holds the weights, `ops` the functions, `attention_metadata` what attention must know about a step.
The type of the weight picks the operator; the device of the tensor picks the implementation.
"""
