"""The strategy interface, composition, replay buffer, instruction embeddings.

Other folders may import:

- compose: compose
- instructions: Instructions, beginnings, instructions
- interface: Strategy, groups, instead, memory
- replay_buffer: ReplayBuffer, chosen, reservoir
"""
