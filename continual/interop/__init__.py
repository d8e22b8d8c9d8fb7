"""Bridges to other libraries of the field.

Other folders may import:

- avalanche: AvalancheModel, Criterion, EncodedDataset, copy_shared_tensors, deserialize_state,
  import_avalanche, make_benchmark, make_benchmark_from_examples, serialize_state, to_examples,
  to_tensors
"""
