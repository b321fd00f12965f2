"""The fields of a row that mean something. All others are ignored, and not even read from Parquet files."""

from sft_dist.data.conversation import REASONING_KEYS

FORMAT_KEYS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
}
OPTIONAL_FIELDS = ("input", "history", "system", "tools", "functions", *REASONING_KEYS)
WEIGHT_FIELDS = ("weight", "train")
# Refused because no message can hold them: leaving them out would train something else than the row says.
REFUSED_FIELDS = ("images", "image", "videos", "video", "audios", "audio")
ROW_FIELDS = (
    *(key for keys in FORMAT_KEYS.values() for key in keys),
    *OPTIONAL_FIELDS,
    *WEIGHT_FIELDS,
    *REFUSED_FIELDS,
)
