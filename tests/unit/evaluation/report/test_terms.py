import re
from pathlib import Path

from mmdistill.evaluation.report.terms import TERMS

GLOSSARY = Path(__file__).resolve().parents[4] / "docs" / "glossary.md"


def test_the_terms_are_those_of_the_glossary():
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", GLOSSARY.read_text(), flags=re.MULTILINE))
    assert {term: rows.get(term) for term in TERMS} == TERMS
