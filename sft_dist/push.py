"""An export to a hub: one commit, private where that was asked, and never a token in what is said."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from sft_dist.data.hub import client_failures
from sft_dist.errors import ConfigError
from sft_dist.redact import redacted

# Of an earlier export with other shards. transformers would take a left-over model.safetensors before the index.
STALE = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
NOT_PUSHED = (".*", "*/.*")
MENDS = {
    401: "the token is not known there: make one with write access and put it into HF_TOKEN",
    403: "the token may not write there: use one with write access to that owner",
    404: "there is no such place for this token: check the owner, and that the token may write there",
}


def push(directory: Path, repository: str, *, private: bool, message: str) -> str:
    """Upload an export to `owner/name`, which is made where it is not there. Returns its address.

    Raises ConfigError, with what to do, when there is no token or the hub says no; the export stays as it is.
    """
    api = HfApi()
    with _explained(repository, directory, api.endpoint):
        if huggingface_hub.get_token() is None:
            raise ConfigError(
                f"--push-to-hub {repository}: there is no token; set HF_TOKEN, or log in with `hf auth login`"
            )
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise ConfigError(
                f"--push-to-hub {repository}: is there already, and public; nothing was pushed. Make it private on the "
                "hub, name another, or leave --private out"
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message=message,
            ignore_patterns=list(NOT_PUSHED),
            delete_patterns=list(STALE),
        )
    return str(url)


@contextmanager
def _explained(repository: str, directory: Path, endpoint: str) -> Iterator[None]:
    """Turn what can go wrong on the way into one line with a mend."""
    stays = f"; the export stays in {directory}"
    try:
        yield
    except HFValidationError:
        raise ConfigError(
            f"--push-to-hub {repository}: is no name of a repository; expected owner/name{stays}"
        ) from None
    except OfflineModeIsEnabled:
        raise ConfigError(f"--push-to-hub {repository}: HF_HUB_OFFLINE is set; unset it to push{stays}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = " ".join(redacted(error.server_message or str(error)).split())[:200]
        mend = MENDS.get(status, "try again, or push the directory by hand")
        raise ConfigError(f"--push-to-hub {repository}: {endpoint} answers {status} ({said}); {mend}{stays}") from None
    except client_failures() as error:
        said = " ".join(redacted(str(error)).split())[:200]
        raise ConfigError(
            f"--push-to-hub {repository}: {endpoint} cannot be reached ({said}); check the network and HF_ENDPOINT"
            f"{stays}"
        ) from None
