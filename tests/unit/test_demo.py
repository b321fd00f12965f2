"""The generated demo: formulas against worked values, the split, the files, the tokenizer and the model."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sft_dist.demo import dataset, formulas, templates
from sft_dist.demo.model import build_model, build_tokenizer
from sft_dist.errors import ConfigError

NUM_EXAMPLES = 1200


@pytest.fixture(scope="module")
def train_examples() -> list[dataset.DemoExample]:
    return list(dataset.generate_examples(NUM_EXAMPLES, 0, "train"))


@pytest.fixture(scope="module")
def held_out_examples() -> list[dataset.DemoExample]:
    return list(dataset.generate_examples(NUM_EXAMPLES, 0, "held_out"))


@pytest.fixture(scope="module")
def tokenizer_dir(train_examples: list[dataset.DemoExample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = dataset.example_texts(train_examples[:600])
    return build_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=600)


# Worked by hand; each comment is the arithmetic.


def test_body_mass_index() -> None:
    assert formulas.rounded(formulas.body_mass_index(70, 175), 1) == "22.9"  # 70 / 3.0625 = 22.857


def test_creatinine_clearance_of_a_man_and_a_woman() -> None:
    assert formulas.rounded(formulas.creatinine_clearance(65, 80, 1.2, "male")) == "69"  # 75 * 80 / 86.4 = 69.44
    assert formulas.rounded(formulas.creatinine_clearance(65, 80, 1.2, "female")) == "59"  # 69.44 * 0.85 = 59.03


@pytest.mark.parametrize(
    ("age", "creatinine", "sex", "expected"),
    [
        (50, 1.0, "male", "92"),  # 142 * (1/0.9)^-1.2 * 0.9938^50 = 142 * 0.88123 * 0.73276 = 91.69
        (50, 1.0, "female", "69"),  # 142 * (1/0.7)^-1.2 * 0.73276 * 1.012 = 142 * 0.65180 * 0.74155 = 68.64
        (
            55,
            0.9,
            "female",
            "75",
        ),  # 142 * (0.9/0.7)^-1.2 * 0.9938^55 * 1.012 = 142 * 0.73965 * 0.71030 * 1.012 = 75.499
        (30, 0.7, "female", "119"),  # ratio 1: 142 * 0.9938^30 * 1.012 = 142 * 0.82980 * 1.012 = 119.25
        (40, 0.6, "male", "125"),  # 142 * (2/3)^-0.302 * 0.9938^40 = 142 * 1.13025 * 0.77978 = 125.15
    ],
)
def test_glomerular_filtration_rate(age: int, creatinine: float, sex: formulas.Sex, expected: str) -> None:
    assert formulas.rounded(formulas.glomerular_filtration_rate(age, creatinine, sex)) == expected


def test_mean_arterial_pressure() -> None:
    assert formulas.rounded(formulas.mean_arterial_pressure(120, 80)) == "93"  # 80 + 40 / 3


def test_anion_gap() -> None:
    assert formulas.anion_gap(140, 104, 24) == 12


def test_corrected_calcium() -> None:
    assert formulas.rounded(formulas.corrected_calcium(8.0, 2.5), 1) == "9.2"  # 8.0 + 0.8 * 1.5


def test_corrected_sodium() -> None:
    assert formulas.rounded(formulas.corrected_sodium(130, 600)) == "138"  # 130 + 1.6 * 5


def test_fractional_sodium_excretion() -> None:
    assert formulas.rounded(formulas.fractional_sodium_excretion(20, 140, 100, 2.0), 2) == "0.29"  # 100 * 40 / 14000


def test_corrected_qt() -> None:
    assert formulas.rounded(formulas.corrected_qt(400, 60)) == "400"  # one second between beats: no correction
    assert formulas.rounded(formulas.corrected_qt(360, 100)) == "465"  # 360 / sqrt(0.6) = 464.76


def test_expected_paco2() -> None:
    assert formulas.expected_paco2(12) == 26  # 18 + 8


def test_arterial_ph_of_normal_blood() -> None:
    assert formulas.rounded(formulas.arterial_ph(24, 40), 2) == "7.40"  # 6.1 + log10(20) = 7.401


def test_halves_round_away_from_zero() -> None:
    assert (formulas.rounded(2.5), formulas.rounded(2.675, 2), formulas.rounded(-0.25, 1)) == ("3", "2.68", "-0.3")


@pytest.mark.parametrize(
    ("systolic", "diastolic", "expected"),
    [
        (119, 79, "Normal blood pressure"),
        (120, 79, "Elevated blood pressure"),
        (129, 80, "Stage 1 hypertension"),
        (130, 70, "Stage 1 hypertension"),
        (118, 90, "Stage 2 hypertension"),
        (140, 70, "Stage 2 hypertension"),
    ],
)
def test_blood_pressure_categories_change_at_the_published_limits(systolic: int, diastolic: int, expected: str) -> None:
    assert templates.blood_pressure_category(systolic, diastolic) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("bmi", 18.4, "Underweight"), ("bmi", 18.5, "Normal weight"), ("bmi", 24.9, "Normal weight"),
        ("bmi", 25.0, "Overweight"), ("bmi", 30.0, "Obesity class 1"), ("bmi", 40.0, "Obesity class 3"),
        ("gfr", 14, "G5"), ("gfr", 44, "G3b"), ("gfr", 45, "G3a"), ("gfr", 90, "G1"),
        ("hba1c", 5.6, "Normal A1c"), ("hba1c", 5.7, "Prediabetes"), ("hba1c", 6.5, "Diabetes"),
        ("anemia, woman", 11.9, "Mild anemia"), ("anemia, woman", 12.0, "No anemia"),
        ("anemia, man", 7.9, "Severe anemia"), ("anemia, man", 10.9, "Moderate anemia"),
        ("anemia, man", 12.9, "Mild anemia"), ("anemia, man", 13.0, "No anemia"),
    ],
)  # fmt: skip
def test_scales_change_at_the_published_limits(name: str, value: float, expected: str) -> None:
    scale = next(scale for scale in templates.SCALES if scale.name == name)
    assert templates.scale_band(scale, value) == expected


def test_generated_scale_answers_agree_with_their_bands(train_examples: list[dataset.DemoExample]) -> None:
    scales = {scale.name: scale for scale in templates.SCALES}
    checked = 0
    for example in train_examples:
        if example.template == "closed_qa" and example.values[0] in scales:
            assert example.answer == templates.scale_band(scales[str(example.values[0])], float(example.values[1]))
            checked += 1
    assert checked > 50


def test_steps_of_generated_reasoning_add_up(train_examples: list[dataset.DemoExample]) -> None:
    sums = 0
    for example in train_examples:
        if example.template == "step_by_step":
            for left, sign, right, result in re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", example.answer):
                assert int(left) + (int(right) if sign == "+" else -int(right)) == int(result), example.answer
                sums += 1
    assert sums > 300


def test_acid_base_cases_obey_henderson_hasselbalch_and_their_label(train_examples: list[dataset.DemoExample]) -> None:
    cases = [example for example in train_examples if example.values[0] == "acid-base"]
    for example in cases:
        _, ph, paco2, bicarbonate = example.values
        assert formulas.rounded(formulas.arterial_ph(float(bicarbonate), float(paco2)), 2) == ph
        assert ("acidosis" in example.answer) == (float(ph) < 7.35)
        same_direction = (float(paco2) < 40) == (float(ph) < 7.4)  # the metabolic disorders
        assert same_direction == ("Metabolic" in example.answer)
    assert len(cases) > 20


def test_electrolyte_cases_have_one_abnormal_value_which_is_the_answer(
    train_examples: list[dataset.DemoExample],
) -> None:
    cases = [example for example in train_examples if example.values[0] == "electrolytes"]
    for example in cases:
        abnormal = []
        for value, normal in zip(example.values[1:], templates.ELECTROLYTES.values(), strict=True):
            abnormal += [normal.below] * (float(value) < normal.low) + [normal.above] * (float(value) > normal.high)
        assert abnormal == [example.answer[3:]]
    assert len(cases) > 20


def test_multiple_choice_answer_is_one_of_its_options(train_examples: list[dataset.DemoExample]) -> None:
    letters = Counter()
    for example in train_examples:
        if example.template == "multiple_choice":
            assert example.answer in example.user.split("\n")
            letters[example.answer[0]] += 1
    # 200 draws over four letters: 50 each, standard deviation 6; 25 is four deviations away.
    assert min(letters[letter] for letter in "ABCD") > 25


def test_extraction_answers_are_json_copied_from_the_note(train_examples: list[dataset.DemoExample]) -> None:
    for example in train_examples:
        if example.template == "extraction":
            fields = json.loads(example.answer)
            assert list(fields) == ["age", "condition", "medication", "symptom", "days"]
            assert all(str(value) in example.user for value in fields.values())


def test_every_prompt_has_one_sentence_of_system_and_a_trailing_cue(train_examples: list[dataset.DemoExample]) -> None:
    cues = {"summary": "\nSummary:", "extraction": "\nOutput:"}
    for example in train_examples:
        assert example.system.count(".") == 1
        assert example.system.endswith(".")
        assert example.user.endswith(cues.get(example.template, "\nAnswer:"))
        assert example.answer == example.answer.strip() != ""


def test_templates_take_turns(train_examples: list[dataset.DemoExample]) -> None:
    assert set(Counter(example.template for example in train_examples).values()) == {NUM_EXAMPLES // 6}


def test_held_out_shares_no_values_and_no_prompt_with_training(
    train_examples: list[dataset.DemoExample], held_out_examples: list[dataset.DemoExample]
) -> None:
    # Another seed's training set too: the split belongs to the values, not to the draw.
    train = [*train_examples, *dataset.generate_examples(NUM_EXAMPLES, 7, "train")]
    assert not {(e.template, e.values) for e in train} & {(e.template, e.values) for e in held_out_examples}
    assert not {e.user for e in train} & {e.user for e in held_out_examples}


def test_copied_answers_of_the_held_out_set_are_new(
    train_examples: list[dataset.DemoExample], held_out_examples: list[dataset.DemoExample]
) -> None:
    trained = {e.answer for e in [*train_examples, *dataset.generate_examples(20_000, 7, "train")]}
    copied = [e.answer for e in held_out_examples if e.template in ("summary", "extraction")]
    assert len(copied) == NUM_EXAMPLES // 3
    assert not trained & set(copied)


def test_articles_fit_the_age(train_examples: list[dataset.DemoExample]) -> None:
    prompts = "\n".join(e.user for e in train_examples)
    assert "An 80-year-old" in prompts
    assert not re.search(r"\bA 8\d-year|\bAn [^8]\d-year", prompts)


def test_values_decide_the_answer(train_examples: list[dataset.DemoExample]) -> None:
    """The split would leak if one answer's values left out something the answer depends on."""
    answers: dict[tuple[object, ...], set[str]] = {}
    for example in [*train_examples, *dataset.generate_examples(6000, 3, "train")]:
        answer = example.answer[3:] if example.template == "multiple_choice" else example.answer
        answers.setdefault((example.template, *example.values), set()).add(answer)
    assert all(len(found) == 1 for found in answers.values())


def test_no_constant_answer_is_right_often(held_out_examples: list[dataset.DemoExample]) -> None:
    for template in templates.TEMPLATES:
        counts = Counter(e.answer for e in held_out_examples if e.template == template)
        assert counts.most_common(1)[0][1] / counts.total() < 0.25, template


def test_the_same_seed_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from sft_dist.demo.dataset import write_demo_data; "
        "write_demo_data(Path(sys.argv[1]), num_train=60, num_held_out=12, seed=5); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    digests = []
    for hash_seed in ("1", "2"):
        directory = tmp_path / hash_seed
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(templates.__file__).parents[2])}
        subprocess.run([sys.executable, "-c", script, str(directory)], check=True, env=environment)
        digests.append({path.name: path.read_bytes() for path in directory.iterdir()})
    assert digests[0] == digests[1]
    assert len(digests[0]) == 4


def test_another_seed_gives_other_examples() -> None:
    assert list(dataset.generate_examples(6, 0, "train")) != list(dataset.generate_examples(6, 1, "train"))


def test_files_hold_the_generated_examples_in_three_formats(tmp_path: Path) -> None:
    files = dataset.write_demo_data(tmp_path, num_train=20, num_held_out=7, seed=0)
    examples = list(dataset.generate_examples(20, 0, "train"))
    rows = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in files.train]
    assert [len(part) for part in rows] == [6, 7, 7]
    messages, alpaca, sharegpt = rows
    assert [row["messages"][2]["content"] for row in messages] == [e.answer for e in examples[:6]]
    assert [(row["instruction"], row["output"]) for row in alpaca] == [(e.user, e.answer) for e in examples[6:13]]
    assert [[turn["value"] for turn in row["conversations"]] for row in sharegpt] == [
        [e.system, e.user, e.answer] for e in examples[13:]
    ]
    held_out = [json.loads(line) for line in files.held_out.read_text(encoding="utf-8").splitlines()]
    assert [row["template"] for row in held_out] == [*templates.TEMPLATES, "closed_qa"]


def test_every_template_occurs_in_every_training_file(tmp_path: Path) -> None:
    for path in dataset.write_demo_data(tmp_path, num_train=90, num_held_out=6, seed=0).train:
        text = path.read_text(encoding="utf-8")
        assert all(template.system in text for template in templates.TEMPLATES.values())


def test_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_train=2"):
        dataset.write_demo_data(tmp_path, num_train=2, num_held_out=1, seed=0)


def test_tokenizer_renders_chatml_and_loses_no_text(
    tokenizer_dir: Path, held_out_examples: list[dataset.DemoExample]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for example in [*held_out_examples[:12], dataset.DemoExample("x", "Café 38.4 °C 😀\t", "a  b", "Ω", ())]:
        messages = dataset.messages_row(example)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        assert text == expected
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert ids.count(tokenizer.eos_token_id) == 3
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert expected.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")


def test_every_digit_is_a_token_of_its_own(tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    several = [token for token in tokenizer.get_vocab() if re.search(r"\d", token) and len(token) > 1]
    assert several == []


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=200.*259"):
        build_tokenizer(["text"], tmp_path, vocab_size=200)


def test_model_loads_with_tied_embeddings_and_stops_at_the_end_of_a_turn(tokenizer_dir: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    first = build_model(tokenizer_dir, tmp_path / "a", seed=1, **sizes)
    state = torch.get_rng_state()
    second = build_model(tokenizer_dir, tmp_path / "b", seed=1, **sizes)
    other = build_model(tokenizer_dir, tmp_path / "c", seed=2, **sizes)
    assert torch.equal(state, torch.get_rng_state())
    weights = [(directory / "model.safetensors").read_bytes() for directory in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(first), AutoTokenizer.from_pretrained(first)
    assert model.config.model_type == "qwen2"
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.config.vocab_size == len(tokenizer)


def test_heads_that_do_not_divide_the_hidden_size_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_heads=3"):
        build_model(tokenizer_dir, tmp_path, hidden_size=32, num_heads=3)
