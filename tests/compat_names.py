"""Which test is about which private name of `pte_trl/compat`."""

# Names whose test needs more than one process, a checkpoint of DeepSpeed or a hub.
ELSEWHERE = {
    "engines.checkpoint_records": "test_safety.py::test_deepspeeds_own_loader_runs_nothing_and_reads_its_records",
    "engines.running_zero_stage": "test_startup.py::test_an_honest_launch_trains_and_shows_itself",
    "engines.zero3_numel": "test_startup.py::test_an_honest_launch_trains_and_shows_itself",
    "engines.zero3_part": "test_engines.py::test_two_processes_do_what_one_does",
    "engines.release_backward_leftovers": "test_lockstep.py::test_ranks_with_unlike_samples_do_what_one_process_does",
    "hub.set_offline": "test_hub.py::test_what_is_cached_is_reachable_and_the_libraries_read_the_cache",
    "transformers.BEAM_SEARCH": "test_cache_generate.py::test_beam_search_reorders_keys_and_states",
}


def about(*names: str):
    """Marks a test as the one that says what these names must do, FILE.NAME each."""

    def mark(test):
        test.about = names
        return test

    return mark
