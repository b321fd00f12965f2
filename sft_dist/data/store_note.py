"""What run.json says of the training data, so that a run can be told of where its store is gone."""

from typing import Any

from sft_dist.data.inspect_figures import causes, length_bins
from sft_dist.data.store import TokenStore


def store_note(store: TokenStore) -> dict[str, Any]:
    """Fingerprint, counts, and lengths in bins: bin i holds edges[i] <= tokens < edges[i+1] of an example."""
    bins = length_bins(store)
    return {
        "store": str(store.path),
        "fingerprint": store.fingerprint,
        **{key: store.meta[key] for key in ("rows_read", "rows_kept", "examples", "tokens", "response_tokens")},
        **{key: {cause.name: cause.count for cause in causes(store.meta, key)} for key in ("dropped", "notes")},
        "lengths": {
            "edges": list(bins.edges),
            "is_log": bins.is_log,
            "cut": bins.cut,
            "examples": bins.counts(store.lengths),
            "responses": bins.counts(store.num_responses),
            "longest": store.max_length,
        },
    }
