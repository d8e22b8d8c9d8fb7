"""Several processes at one run: collectives, and dealing out the work.

Other folders may import:

- processes: all_processes, all_reduce_gradients, all_reduce_max, all_reduce_sum, barrier,
  broadcast, check_equal_on_all, is_main_process, main_process_first, num_started_processes,
  process_group, single_process, wait_for_first_message, world_size
- work: assign_work, gather_by_index, iter_own_items, split_evenly
"""
