"""Clinical formulas, each with its units and its source. For demonstration; nothing here is medical advice."""

from decimal import ROUND_HALF_UP, Decimal
from math import log10, sqrt
from typing import Literal

Sex = Literal["male", "female"]


def body_mass_index(weight_kg: float, height_cm: float) -> float:
    """Body mass index in kg/m^2. Source: Keys et al., J Chronic Dis 1972;25:329-343."""
    return weight_kg / (height_cm / 100) ** 2


def creatinine_clearance(age_years: int, weight_kg: float, creatinine_mg_dl: float, sex: Sex) -> float:
    """Creatinine clearance in mL/min. Source: Cockcroft and Gault, Nephron 1976;16:31-41."""
    male = (140 - age_years) * weight_kg / (72 * creatinine_mg_dl)
    return male * 0.85 if sex == "female" else male


def glomerular_filtration_rate(age_years: int, creatinine_mg_dl: float, sex: Sex) -> float:
    """Estimated GFR in mL/min/1.73 m^2, CKD-EPI 2021 (without race).

    Source: Inker et al., N Engl J Med 2021;385:1737-1749.
    """
    kappa, alpha, factor = (0.7, -0.241, 1.012) if sex == "female" else (0.9, -0.302, 1.0)
    ratio = creatinine_mg_dl / kappa
    return float(142 * min(ratio, 1) ** alpha * max(ratio, 1) ** -1.2 * 0.9938**age_years * factor)


def mean_arterial_pressure(systolic_mmhg: float, diastolic_mmhg: float) -> float:
    """Mean arterial pressure in mmHg: diastolic plus a third of the pulse pressure.

    Source: Sesso et al., Hypertension 2000;36:801-807.
    """
    return diastolic_mmhg + (systolic_mmhg - diastolic_mmhg) / 3


def anion_gap(sodium: float, chloride: float, bicarbonate: float) -> float:
    """Serum anion gap in mEq/L, without potassium; all in mEq/L.

    Source: Emmett and Narins, Medicine (Baltimore) 1977;56:38-54.
    """
    return sodium - (chloride + bicarbonate)


def corrected_calcium(calcium_mg_dl: float, albumin_g_dl: float) -> float:
    """Calcium in mg/dL at an albumin of 4 g/dL, with the slope of 0.8 in common use.

    Source: Payne et al., Br Med J 1973;4:643-646, whose own regression had a slope of 1.
    """
    return calcium_mg_dl + 0.8 * (4.0 - albumin_g_dl)


def corrected_sodium(sodium: float, glucose_mg_dl: float) -> float:
    """Sodium in mEq/L at a glucose of 100 mg/dL: 1.6 per 100 mg/dL.

    Source: Katz, N Engl J Med 1973;289:843-844.
    """
    return sodium + 1.6 * (glucose_mg_dl - 100) / 100


def fractional_sodium_excretion(
    urine_sodium: float, plasma_sodium: float, urine_creatinine: float, plasma_creatinine: float
) -> float:
    """Fractional excretion of sodium in percent; sodium in mEq/L, creatinine in mg/dL.

    Source: Espinel, JAMA 1976;236:579-581.
    """
    return 100 * urine_sodium * plasma_creatinine / (plasma_sodium * urine_creatinine)


def corrected_qt(qt_ms: float, heart_rate: float) -> float:
    """QT interval in ms at 60 beats/min. Source: Bazett, Heart 1920;7:353-370."""
    return qt_ms / sqrt(60 / heart_rate)


def expected_paco2(bicarbonate: float) -> float:
    """Centre of the expected PaCO2 (+/- 2 mmHg) in metabolic acidosis.

    Source: Albert, Dell and Winters, Ann Intern Med 1967;66:312-322.
    """
    return 1.5 * bicarbonate + 8


def arterial_ph(bicarbonate: float, paco2_mmhg: float) -> float:
    """pH of blood by the Henderson-Hasselbalch equation, bicarbonate in mEq/L.

    Source: Hasselbalch, Biochem Z 1917;78:112-144.
    """
    return 6.1 + log10(bicarbonate / (0.03 * paco2_mmhg))


def rounded(value: float, decimals: int = 0) -> str:
    """The value with this many decimals, halves away from zero, as clinicians round."""
    # Nine decimals first: 2.675 is stored as 2.67499..., and would lose its half.
    exact = Decimal(repr(round(value, 9)))
    return str(exact.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_UP))
