"""TODO cluster.data_context"""

import logging


def quiet_ray_data() -> None:
    """Keep Ray Data's bars, plans and advice out of sight in this process: the app reports rows, and waits, itself."""
    from ray.data import DataContext  # a second to import

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
