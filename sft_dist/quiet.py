"""Libraries say what a user can act on, and no more."""

import logging
import warnings


def quiet_libraries() -> None:
    """Hush what DeepSpeed, transformers and torch print at every start. Call before they build or load a model."""
    logging.getLogger("DeepSpeed").addFilter(_is_worth_saying)
    # DeepSpeed calls collectives by the names of torch 2.11, which torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated.*")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING and "Setting accelerator to CPU" not in record.getMessage()
