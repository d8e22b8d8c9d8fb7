"""The strategy interface, composition, replay buffer, instruction embeddings.

Other folders may import:

- compose: compose
- instructions: InstructionCounts, extract_instructions, extract_prompt_prefixes, mean_embedding
- interface: Strategy, memory, replaces_super, to_param_groups
- projection: project_out
- replay_buffer: ReplayBuffer, sample_task_examples, update_reservoir
- self_generation: GENERATION_BATCH_SIZE, append_response, strip_response
"""
