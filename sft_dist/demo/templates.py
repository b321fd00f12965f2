"""Six shapes of question, with answers that follow from the prompt by a formula, a threshold or by copying.

A held-out answer can be worked out but not remembered: no values of a held-out example occur in training.
"""

import json
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sft_dist.demo.formulas import (
    Sex,
    anion_gap,
    arterial_ph,
    body_mass_index,
    corrected_calcium,
    corrected_qt,
    corrected_sodium,
    creatinine_clearance,
    expected_paco2,
    fractional_sodium_excretion,
    glomerular_filtration_rate,
    mean_arterial_pressure,
    rounded,
)

Value = str | int | float


class Draft(NamedTuple):
    """A prompt, its answer, and the values that fix the answer, none besides: new values then mean a new question."""

    user: str
    answer: str
    values: tuple[Value, ...]


class Scale(NamedTuple):
    """A measurement with named bands: `bands` are (first value above the band, label), ascending."""

    name: str
    question: str
    unit: str
    decimals: int
    lowest: float
    bands: tuple[tuple[float, str], ...]


SCALES = (
    # WHO Technical Report Series 894, 2000.
    Scale("bmi", "Which weight category is a body mass index of {}?", "kg/m2", 1, 15.0, (
        (18.5, "Underweight"), (25, "Normal weight"), (30, "Overweight"),
        (35, "Obesity class 1"), (40, "Obesity class 2"), (50, "Obesity class 3"))),
    # KDIGO 2012, Kidney Int Suppl 2013;3:1-150.
    Scale("gfr", "Which KDIGO category is a glomerular filtration rate of {}?", "mL/min/1.73 m2", 0, 5, (
        (15, "G5"), (30, "G4"), (45, "G3b"), (60, "G3a"), (90, "G2"), (121, "G1"))),
    # American Diabetes Association, Diabetes Care 2024;47(Suppl 1):S20-S42.
    Scale("hba1c", "How is a hemoglobin A1c of {} classified?", "%", 1, 4.2, (
        (5.7, "Normal A1c"), (6.5, "Prediabetes"), (12.1, "Diabetes"))),
    # WHO/NMH/NHD/MNM/11.1, 2011.
    Scale("anemia, woman", "Which anemia grade is a hemoglobin of {} in a non-pregnant woman?", "g/dL", 1, 5.0, (
        (8, "Severe anemia"), (11, "Moderate anemia"), (12, "Mild anemia"), (15.6, "No anemia"))),
    Scale("anemia, man", "Which anemia grade is a hemoglobin of {} in an adult man?", "g/dL", 1, 5.0, (
        (8, "Severe anemia"), (11, "Moderate anemia"), (13, "Mild anemia"), (17.1, "No anemia"))),
)  # fmt: skip


class Electrolyte(NamedTuple):
    """Reference interval low..high of adults, what is drawn outside it, and what that is called."""

    low: float
    high: float
    lowest: float
    highest: float
    decimals: int
    unit: str
    below: str
    above: str


ELECTROLYTES = {
    "sodium": Electrolyte(135, 145, 118, 162, 0, "mEq/L", "Hyponatremia", "Hypernatremia"),
    "potassium": Electrolyte(3.5, 5.0, 2.4, 6.8, 1, "mEq/L", "Hypokalemia", "Hyperkalemia"),
    "calcium": Electrolyte(8.5, 10.5, 6.2, 13.8, 1, "mg/dL", "Hypocalcemia", "Hypercalcemia"),
}

# Long-term conditions with a usual oral drug and its usual doses.
CONDITIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("hypertension", "amlodipine", ("5 mg daily", "10 mg daily")),
    ("type 2 diabetes", "metformin", ("500 mg twice daily", "1000 mg twice daily")),
    ("hypothyroidism", "levothyroxine", ("50 mcg daily", "100 mcg daily")),
    ("hyperlipidemia", "atorvastatin", ("20 mg daily", "40 mg daily")),
    ("atrial fibrillation", "apixaban", ("5 mg twice daily",)),
    ("gout", "allopurinol", ("100 mg daily", "300 mg daily")),
    ("depression", "sertraline", ("50 mg daily", "100 mg daily")),
    ("heart failure", "carvedilol", ("6.25 mg twice daily", "12.5 mg twice daily")),
    ("reflux disease", "omeprazole", ("20 mg daily", "40 mg daily")),
    ("epilepsy", "levetiracetam", ("500 mg twice daily", "1000 mg twice daily")),
)
SYMPTOMS = ("cough", "headache", "nausea", "fatigue", "dizziness", "back pain", "palpitations", "joint pain")


class Admission(NamedTuple):
    """A reason for admission with what usually belongs to it."""

    diagnosis: str
    symptoms: tuple[str, ...]
    treatment: str
    drug: str
    doses: tuple[str, ...]
    clinic: str


ADMISSIONS = (
    Admission("decompensated heart failure", ("leg swelling", "dyspnea", "orthopnea"), "intravenous furosemide",
              "furosemide", ("20 mg daily", "40 mg daily"), "cardiology"),
    Admission("community-acquired pneumonia", ("fever", "productive cough", "pleuritic chest pain"),
              "intravenous ceftriaxone", "cefpodoxime", ("200 mg twice daily",), "primary care"),
    Admission("acute pyelonephritis", ("fever", "flank pain", "dysuria"), "intravenous ceftriaxone",
              "ciprofloxacin", ("500 mg twice daily",), "primary care"),
    Admission("an exacerbation of chronic obstructive pulmonary disease", ("wheezing", "productive cough", "dyspnea"),
              "nebulized albuterol", "prednisone", ("40 mg daily",), "pulmonology"),
    Admission("cellulitis of the leg", ("leg redness", "fever", "leg pain"), "intravenous cefazolin",
              "cephalexin", ("500 mg four times daily",), "primary care"),
    Admission("a bleeding duodenal ulcer", ("melena", "dizziness", "epigastric pain"), "intravenous pantoprazole",
              "pantoprazole", ("40 mg twice daily",), "gastroenterology"),
    Admission("rapid atrial fibrillation", ("palpitations", "dizziness", "dyspnea"), "intravenous diltiazem",
              "apixaban", ("5 mg twice daily",), "cardiology"),
    Admission("diabetic ketoacidosis", ("vomiting", "abdominal pain", "polyuria"), "intravenous insulin",
              "insulin glargine", ("16 units daily", "20 units daily", "24 units daily"), "endocrinology"),
)  # fmt: skip


def _between(rng: random.Random, low: float, high: float, decimals: int = 0) -> float:
    """A value in low..high, both included, on the grid of `decimals`; an int when decimals is 0."""
    ticks = rng.randint(round(low * 10**decimals), round(high * 10**decimals))
    return round(ticks / 10**decimals, decimals) if decimals else ticks


def _patient(rng: random.Random) -> tuple[int, Sex]:
    return rng.randint(20, 89), rng.choice(("male", "female"))


def _person(age_years: int, sex: Sex) -> str:
    return f"{age_years}-year-old {'man' if sex == 'male' else 'woman'}"


def _a(person: str) -> str:
    """The person with an article: eighty is the only age drawn that begins with a vowel sound."""
    return f"{'An' if person.startswith('8') else 'A'} {person}"


# ---- 1: closed questions -------------------------------------------------------------------------


def blood_pressure_category(systolic: int, diastolic: int) -> str:
    """Category of an adult's blood pressure in mmHg. Source: Whelton et al., Hypertension 2018;71:e13-e115."""
    if systolic >= 140 or diastolic >= 90:
        return "Stage 2 hypertension"
    if systolic >= 130 or diastolic >= 80:
        return "Stage 1 hypertension"
    return "Elevated blood pressure" if systolic >= 120 else "Normal blood pressure"


def scale_band(scale: Scale, value: float) -> str:
    """Label of the band that holds the value."""
    return next(label for upper, label in scale.bands if value < upper)


def _pressure_question(rng: random.Random) -> Draft:
    wanted = rng.choice(
        ("Normal blood pressure", "Elevated blood pressure", "Stage 1 hypertension", "Stage 2 hypertension")
    )
    while True:
        systolic = rng.randint(92, 178)
        diastolic = rng.randint(max(52, systolic - 80), min(108, systolic - 25))
        if blood_pressure_category(systolic, diastolic) == wanted:
            break
    user = f"Which category is a blood pressure of {systolic}/{diastolic} mmHg?\nAnswer:"
    return Draft(user, wanted, ("pressure", systolic, diastolic))


def _scale_question(rng: random.Random) -> Draft:
    scale = rng.choice(SCALES)
    band = rng.randrange(len(scale.bands))
    low = scale.bands[band - 1][0] if band else scale.lowest
    value = _between(rng, low, scale.bands[band][0] - 10**-scale.decimals, scale.decimals)
    user = f"{scale.question.format(f'{value} {scale.unit}')}\nAnswer:"
    return Draft(user, scale.bands[band][1], (scale.name, value))


def _closed_qa(rng: random.Random) -> Draft:
    return _pressure_question(rng) if rng.random() < 0.4 else _scale_question(rng)


# ---- 2: calculators ------------------------------------------------------------------------------


def _calculation(patient: str, task: str, answer: str, *values: Value) -> Draft:
    return Draft(f"Patient: {patient}.\nCompute {task}.\nAnswer:", answer, values)


def _compute_bmi(rng: random.Random) -> Draft:
    weight, height = rng.randint(45, 120), rng.randint(150, 195)
    answer = f"{rounded(body_mass_index(weight, height), 1)} kg/m2"
    return _calculation(f"weight {weight} kg, height {height} cm", "the body mass index", answer, "bmi", weight, height)


def _compute_clearance(rng: random.Random) -> Draft:
    age, sex = _patient(rng)
    weight, creatinine = rng.randint(45, 110), _between(rng, 0.6, 3.0, 1)
    answer = f"{rounded(creatinine_clearance(age, weight, creatinine, sex))} mL/min"
    patient = f"{_person(age, sex)}, weight {weight} kg, creatinine {creatinine} mg/dL"
    return _calculation(
        patient, "the Cockcroft-Gault creatinine clearance", answer, "clearance", age, sex, weight, creatinine
    )


def _compute_gfr(rng: random.Random) -> Draft:
    age, sex = _patient(rng)
    creatinine = _between(rng, 0.6, 3.0, 1)
    answer = f"{rounded(glomerular_filtration_rate(age, creatinine, sex))} mL/min/1.73 m2"
    patient = f"{_person(age, sex)}, creatinine {creatinine} mg/dL"
    return _calculation(patient, "the CKD-EPI 2021 glomerular filtration rate", answer, "gfr", age, sex, creatinine)


def _compute_map(rng: random.Random) -> Draft:
    systolic, diastolic = rng.randint(92, 178), rng.randint(50, 90)
    answer = f"{rounded(mean_arterial_pressure(systolic, diastolic))} mmHg"
    return _calculation(
        f"blood pressure {systolic}/{diastolic} mmHg", "the mean arterial pressure", answer, "map", systolic, diastolic
    )


def _compute_gap(rng: random.Random) -> Draft:
    sodium, chloride, bicarbonate = _anion_gap_values(rng)
    patient = f"sodium {sodium}, chloride {chloride}, bicarbonate {bicarbonate} mEq/L"
    answer = f"{rounded(anion_gap(sodium, chloride, bicarbonate))} mEq/L"
    return _calculation(patient, "the anion gap", answer, "gap", sodium, chloride, bicarbonate)


def _compute_calcium(rng: random.Random) -> Draft:
    calcium, albumin = _between(rng, 6.5, 10.5, 1), _between(rng, 1.5, 3.9, 1)
    patient = f"calcium {calcium} mg/dL, albumin {albumin} g/dL"
    answer = f"{rounded(corrected_calcium(calcium, albumin), 1)} mg/dL"
    return _calculation(patient, "the albumin-corrected calcium", answer, "calcium", calcium, albumin)


def _compute_sodium(rng: random.Random) -> Draft:
    sodium, glucose = rng.randint(118, 148), rng.randrange(200, 901, 10)
    patient = f"sodium {sodium} mEq/L, glucose {glucose} mg/dL"
    answer = f"{rounded(corrected_sodium(sodium, glucose))} mEq/L"
    return _calculation(patient, "the glucose-corrected sodium", answer, "sodium", sodium, glucose)


def _compute_fena(rng: random.Random) -> Draft:
    urine_na, plasma_na = rng.randint(8, 90), rng.randint(128, 148)
    urine_cr, plasma_cr = rng.randint(30, 180), _between(rng, 1.2, 5.0, 1)
    patient = (
        f"urine sodium {urine_na}, plasma sodium {plasma_na} mEq/L, "
        f"urine creatinine {urine_cr}, plasma creatinine {plasma_cr} mg/dL"
    )
    answer = f"{rounded(fractional_sodium_excretion(urine_na, plasma_na, urine_cr, plasma_cr), 1)}%"
    return _calculation(
        patient, "the fractional excretion of sodium", answer, "fena", urine_na, plasma_na, urine_cr, plasma_cr
    )


def _compute_qtc(rng: random.Random) -> Draft:
    qt, rate = rng.randrange(320, 471, 2), rng.randint(50, 110)
    answer = f"{rounded(corrected_qt(qt, rate))} ms"
    return _calculation(
        f"QT interval {qt} ms, heart rate {rate}/min", "the QT interval corrected by Bazett", answer, "qtc", qt, rate
    )


def _anion_gap_values(rng: random.Random) -> tuple[int, int, int]:
    """Sodium, chloride and bicarbonate in mEq/L with an anion gap of 5 to 30."""
    sodium, bicarbonate, gap = rng.randint(130, 148), rng.randint(10, 28), rng.randint(5, 30)
    chloride = sodium - bicarbonate - gap
    return (sodium, chloride, bicarbonate) if 92 <= chloride <= 116 else _anion_gap_values(rng)


CALCULATORS = (
    _compute_bmi, _compute_clearance, _compute_gfr, _compute_map, _compute_gap,
    _compute_calcium, _compute_sodium, _compute_fena, _compute_qtc,
)  # fmt: skip


def _calculator(rng: random.Random) -> Draft:
    return rng.choice(CALCULATORS)(rng)


# ---- 3: multiple choice --------------------------------------------------------------------------


def _choice(
    rng: random.Random, case: str, question: str, labels: Sequence[str], correct: str, values: tuple[Value, ...]
) -> Draft:
    """Four options, the correct one among them, in random order; the answer is letter and label."""
    others = [label for label in labels if label != correct]
    options = [correct, *rng.sample(others, 3)]
    rng.shuffle(options)
    lines = "\n".join(f"{letter}. {label}" for letter, label in zip("ABCD", options, strict=True))
    answer = f"{'ABCD'[options.index(correct)]}. {correct}"
    return Draft(f"{case} {question}\n{lines}\nAnswer:", answer, values)


ACID_BASE = ("Metabolic acidosis", "Metabolic alkalosis", "Respiratory acidosis", "Respiratory alkalosis")


def _acid_base_case(rng: random.Random) -> Draft:
    """A single disorder with its expected compensation. Source: Berend et al., N Engl J Med 2014;371:1434-1445."""
    disorder = rng.choice(ACID_BASE)
    while True:
        if disorder == "Metabolic acidosis":
            bicarbonate = rng.randint(8, 19)
            paco2 = round(expected_paco2(bicarbonate)) + rng.randint(-1, 1)
        elif disorder == "Metabolic alkalosis":
            bicarbonate = rng.randint(31, 42)
            paco2 = round(40 + 0.7 * (bicarbonate - 24)) + rng.randint(-1, 1)
        elif disorder == "Respiratory acidosis":
            paco2 = rng.randint(50, 80)
            bicarbonate = round(24 + (paco2 - 40) / 10) + rng.randint(0, 1)
        else:
            paco2 = rng.randint(18, 30)
            bicarbonate = round(24 - 2 * (40 - paco2) / 10) + rng.randint(-1, 0)
        ph = rounded(arterial_ph(bicarbonate, paco2), 2)
        if (float(ph) < 7.35) if "acidosis" in disorder else (float(ph) > 7.45):
            break
    case = f"Blood gas: pH {ph}, PaCO2 {paco2} mmHg, bicarbonate {bicarbonate} mEq/L."
    return _choice(
        rng, case, "Which disorder is most likely?", ACID_BASE, disorder, ("acid-base", ph, paco2, bicarbonate)
    )


THYROID = (
    "Primary hypothyroidism",
    "Subclinical hypothyroidism",
    "Primary hyperthyroidism",
    "Subclinical hyperthyroidism",
)


def _thyroid_case(rng: random.Random) -> Draft:
    """Reference intervals: TSH 0.4-4.0 mIU/L, free T4 0.8-1.8 ng/dL."""
    disorder = rng.choice(THYROID)
    tsh = _between(rng, 4.5, 60, 1) if "hypo" in disorder else _between(rng, 0.01, 0.3, 2)
    if "Subclinical" in disorder:
        tsh = _between(rng, 4.5, 9.9, 1) if "hypo" in disorder else tsh
        free_t4 = _between(rng, 0.9, 1.7, 1)
    else:
        free_t4 = _between(rng, 0.1, 0.6, 1) if "hypo" in disorder else _between(rng, 2.1, 6.0, 1)
    case = f"TSH {tsh} mIU/L, free T4 {free_t4} ng/dL."
    return _choice(rng, case, "Which diagnosis is most likely?", THYROID, disorder, ("thyroid", tsh, free_t4))


def _electrolyte_case(rng: random.Random) -> Draft:
    """One of three electrolytes is outside its reference interval."""
    abnormal, is_high = rng.choice(tuple(ELECTROLYTES)), rng.randrange(2) == 1
    measured: dict[str, float] = {}
    for name, normal in ELECTROLYTES.items():
        low, high, tick = normal.low, normal.high, 10**-normal.decimals
        if name == abnormal:
            low, high = (high + tick, normal.highest) if is_high else (normal.lowest, low - tick)
        measured[name] = _between(rng, low, high, normal.decimals)
    case = ", ".join(f"{name} {value} {ELECTROLYTES[name].unit}" for name, value in measured.items())
    labels = [label for normal in ELECTROLYTES.values() for label in (normal.below, normal.above)]
    correct = ELECTROLYTES[abnormal].above if is_high else ELECTROLYTES[abnormal].below
    values: tuple[Value, ...] = ("electrolytes", *measured.values())
    return _choice(rng, f"Blood: {case}.", "Which abnormality is present?", labels, correct, values)


def _multiple_choice(rng: random.Random) -> Draft:
    return rng.choice((_acid_base_case, _thyroid_case, _electrolyte_case))(rng)


# ---- 4: summaries --------------------------------------------------------------------------------


def _summary(rng: random.Random) -> Draft:
    age, sex = _patient(rng)
    he = "He" if sex == "male" else "She"
    admission = rng.choice(ADMISSIONS)
    symptom, dose = rng.choice(admission.symptoms), rng.choice(admission.doses)
    days, weeks = rng.randint(2, 9), rng.randint(2, 9)
    user = (
        f"Discharge note: {_a(_person(age, sex))} came in with {symptom} due to {admission.diagnosis}. "
        f"{he} received {admission.treatment}, stayed {days} days and went home on {admission.drug} {dose}. "
        f"The {admission.clinic} clinic will review in {weeks} weeks.\nSummary:"
    )
    answer = (
        f"{_person(age, sex)} with {admission.diagnosis}, {admission.treatment}, {days} days. "
        f"Discharged on {admission.drug}, review in {weeks} weeks."
    )
    return Draft(user, answer, (age, sex, admission.diagnosis, days, weeks))


# ---- 5: extraction -------------------------------------------------------------------------------


def _extraction(rng: random.Random) -> Draft:
    age, sex = _patient(rng)
    condition, drug, doses = rng.choice(CONDITIONS)
    medication, symptom, days = f"{drug} {rng.choice(doses)}", rng.choice(SYMPTOMS), rng.randint(2, 14)
    user = (
        f"Note: {_a(_person(age, sex))} with {condition} takes {medication} and reports {symptom} for {days} days.\n"
        'Extract: {"age": ..., "condition": ..., "medication": ..., "symptom": ..., "days": ...}\nOutput:'
    )
    fields = {"age": age, "condition": condition, "medication": medication, "symptom": symptom, "days": days}
    return Draft(user, json.dumps(fields), (age, condition, medication, symptom, days))


# ---- 6: step by step -----------------------------------------------------------------------------


def _gap_steps(rng: random.Random) -> Draft:
    sodium, chloride, bicarbonate = _anion_gap_values(rng)
    anions = chloride + bicarbonate
    gap = sodium - anions
    verdict = "high, above 12" if gap > 12 else "not high, at most 12"
    user = f"Sodium {sodium}, chloride {chloride}, bicarbonate {bicarbonate} mEq/L. Is the anion gap high?\nAnswer:"
    answer = (
        f"Step 1: Anions {chloride} + {bicarbonate} = {anions}.\n"
        f"Step 2: Gap {sodium} - {anions} = {gap} mEq/L.\nStep 3: It is {verdict}."
    )
    return Draft(user, answer, ("gap", sodium, chloride, bicarbonate))


def _perfusion_steps(rng: random.Random) -> Draft:
    """Target of 65 mmHg. Source: Evans et al., Surviving Sepsis Campaign, Crit Care Med 2021;49:e1063-e1143."""
    systolic = rng.randint(70, 130)
    diastolic = rng.randint(max(35, systolic - 60), min(75, systolic - 20))
    pulse = systolic - diastolic
    third = rounded(pulse / 3)
    mean = diastolic + int(third)
    verdict = "reaches" if mean >= 65 else "is below"
    user = (
        f"Septic shock, blood pressure {systolic}/{diastolic} mmHg. "
        "Does the mean arterial pressure reach its target?\nAnswer:"
    )
    answer = (
        f"Step 1: Pulse pressure {systolic} - {diastolic} = {pulse}, a third is {third}.\n"
        f"Step 2: Mean {diastolic} + {third} = {mean} mmHg.\nStep 3: It {verdict} 65 mmHg."
    )
    return Draft(user, answer, ("perfusion", systolic, diastolic))


def _correction_steps(rng: random.Random) -> Draft:
    """At most 8 mEq/L a day at high risk of demyelination.

    Source: Verbalis et al., Am J Med 2013;126(10 Suppl 1):S1-S42.
    """
    before = rng.randint(100, 119)
    now = before + rng.randint(1, 7)
    user = (
        f"Chronic hyponatremia with alcohol use disorder: sodium was {before} mEq/L 12 hours ago "
        f"and is {now} mEq/L now. How much may it still rise before 24 hours?\nAnswer:"
    )
    answer = (
        "Step 1: High risk of osmotic demyelination, limit 8 mEq/L.\n"
        f"Step 2: Highest {before} + 8 = {before + 8} mEq/L.\n"
        f"Step 3: Still {before + 8} - {now} = {before + 8 - now} mEq/L."
    )
    return Draft(user, answer, ("correction", before, now))


def _step_by_step(rng: random.Random) -> Draft:
    return rng.choice((_gap_steps, _perfusion_steps, _correction_steps))(rng)


class Template(NamedTuple):
    system: str
    draft: Callable[[random.Random], Draft]


TEMPLATES: dict[str, Template] = {
    "closed_qa": Template("You are a medical reference and answer in a few words.", _closed_qa),
    "calculator": Template("You are a clinical calculator and reply with number and unit only.", _calculator),
    "multiple_choice": Template("You are a diagnostic assistant and reply with one option only.", _multiple_choice),
    "summary": Template("You are a documentation assistant and reply with two sentences.", _summary),
    "extraction": Template("You are an extraction assistant and reply with valid JSON only.", _extraction),
    "step_by_step": Template(
        "You are a clinical tutor and reply in three steps, the last one the conclusion.", _step_by_step
    ),
}
