"""Which sampler setting? A ladder of them, and what the texts of each are like beside unseen text.

The question has an answer that can be measured (Braverman et al. 2019, "Calibration, entropy rates,
and memory in language models"): at the setting that matches, the model's own text is as surprising
to the model as unseen text of the corpus is. Below it the text is duller than the corpus, above it
wilder. What people notice of that (repetition, invented words, copies) is counted beside it.

    lm = textgen.load("runs/lstm")
    found = explore(lm, ["ROMEO:"], chains(temperatures=[0.5, 0.8, 1]))
    Path("study.html").write_text(render(found))
"""

from textgen.study.ladder import chains
from textgen.study.measure import Study, explore, matching
from textgen.study.page import check_page, publish, render
from textgen.study.report import as_json, as_text

__all__ = ["Study", "as_json", "as_text", "chains", "check_page", "explore", "matching", "publish", "render"]
