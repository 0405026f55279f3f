"""What `docs/results.md` says beside its tables; `benchmarks/report.py` puts both together."""

INTRODUCTION = """# Results

`python -m benchmarks.report` writes this page from `benchmarks/results`. [All runs](runs.md) has every arm and seed.

Model: SmolLM2-135M-Instruct, LoRA of rank 8 on the top ten layers. Text: functions of Python packages, and what their
docstrings say. A known part of the answers is damaged, so it is known which rows are good.

- **AUC** is the chance that a good row weighs more than a damaged one.
- **Gap recovered** is (uniform - arm) / (uniform - clean only), in loss on clean test rows: 0% is training on all rows
  alike, 100% is training on the good rows alone. Above 100% is better than the good rows alone.
- Each arm takes the same number of training steps. What it costs to choose rows comes on top, unless a row says
  otherwise.
- ‡: made on 2 cores of a CPU. † : made with the default of an earlier version.
"""

LARGE = """## 20,000 rows

A quarter of the rows is good, the others are lazy (one of four sentences), swapped (a good answer to another
question) or word salad. There are 64 trusted rows. *mixed*: trusted rows are drawn as the good rows are. *shifted*:
all trusted rows come from one package, the training rows from all others. `fast` is likeness to trusted rows alone.
`python -m benchmarks.large`

{table}

Held-out loss at this size needs a GPU, and has not been measured with this default. The earlier default (a pilot)
reached an AUC of .889 on such rows (swapped .715), with 51% of the weight on the good quarter.
"""

SMALL = """## Small tasks

384 rows (safety: 212) and 32 trusted rows (safety: 48); two epochs of batch 8. Mean of the gap recovered, and how many
seeds it is a mean of:

{table}

`trusted thrice` is the simplest thing that a practitioner would try: all rows alike, and the trusted rows three times
among them. `bilevel trusted` does the same on top of the weights: each trusted row is seen three times as often as the
best rows. `pilot` is the default of earlier versions; in the row `pilot` its 24 steps are taken off, in `pilot on top`
they come on top. On the first seed alone `pilot on top` has 91%, 98%, 90% and 99% on the first four tasks, at about
twice the time. `perplexity` keeps the rows that the untrained model finds likeliest, `dattri` those of most
influence on the trusted rows (Grad-Cos of the library dattri): both are told how many rows are good. `seal` is the
published update as it is.

![Gap recovered, per seed](gap.png)

Weights of the default:

{qualities}
"""

TRUSTED = """## How many trusted rows, how much damage

Weights alone, one thing changed at a time; 32 trusted rows and the task's own mixture otherwise. AUC over all damaged
rows, in parentheses of the kind found worst, per seed. The four sources have 10%, 40%, 60% and 90% damaged rows: one
weight for all rows of a source cannot do better than that. `python -m benchmarks.ablations`

| setting | seeds | AUC | weight on good rows |
|---|---|---|---|
{table}
"""

ROUNDS = """## Self-refining

Rounds in which the model answers questions anew have shown no gain over offline selection (tables in
[all runs](runs.md)). These runs were made with the weights of an earlier version.

"""

READING = """**What the rounds did.** They win nothing over offline selection on either task.

On `safety` offline selection refuses every request already, so all responses of a question are refusals that differ
in wording: scores dealt out at random do as well, and so do the same steps without any response. The loss of benign
rows ends .01 to .05 above that of `bilevel`; over-refusal differs more between seeds than between arms.

On `safety_scarce` there is something to win: two refused requests are not enough, and offline selection ends at 2%,
7% and 3% of the requests for which an unseen refusal is likelier than the stub, clean rows alone at 8 to 17%. The
rounds (first seed, with these weights) end where the same steps without responses end (5% against 3%, 2% with scores
dealt out at random), whatever the lever: more or fewer responses, sharper or softer weights, shorter rounds, all
questions (2% to 7%). Weights can only choose among what was sampled; how many refusals that were was not counted.
`validation only` refuses everything, at a tenth more benign loss.

The random control deals the scores out to other responses of the same question, so that their spread stays what it
is. Sampling ran in training mode; the adapters have no dropout."""

RUNS = """# All runs

`python -m benchmarks.report` writes this page. [Results](results.md) says what the words mean and what was learned.
"""

ABOUT = {
    "quality": "96 good rows, 288 damaged: a third each boilerplate, answers to other questions, word salad.",
    "boilerplate": "192 good rows, 192 answered by one of four boilerplate sentences; three epochs.",
    "scrambled": "192 good rows, 192 with the words of the answer in random order.",
    "truncated": "192 good rows, 192 with the first third of the answer only.",
    "quality_large": (
        "As quality, 320 good rows and 960 damaged. There is no gap to recover: clean data alone are the same 320 "
        "rows eight times over, and end above uniform mixing of four times as many; weighted rows end below both."
    ),
    "truncated_large": "As truncated, 640 rows of each: the pilot takes 24 of 320 steps.",
    "scrambled_large": "As scrambled, 640 rows of each: the pilot takes 24 of 320 steps.",
    "safety": (
        "96 benign and 40 refused requests, 76 harmful ones answered by a compliance stub; learning rate 1e-3. Test "
        "loss is that of benign rows; refusal rates are over 60 unseen harmful requests, over-refusal over 80 benign "
        "ones."
    ),
    "safety_scarce": (
        "The same as `safety` with 2 refused requests and 114 stubs: the questions are there, their answers are not."
    ),
    "refine_levers": "Settings of the `refine` arm on the task above, one at a time; the first seed.",
    "validation_term": (
        "The validation term in the model's objective on the quality task, with the weights of its `bilevel` arm "
        "given: lambda = 0.5 in every step or, k times as strong, in every k-th step."
    ),
}

REFINE = """The `refine` arms take {offline} offline steps with the weights of the `bilevel` arm, then rounds. In a
round, each step trains on 8 offline rows and 8 responses; `bilevel double` has as many rows per step. Generation,
scoring and the look-ahead come on top (seconds of training, with fifteen other runs on the GPU, or on one of two CPU
cores: an indication only).
`refine random` deals the scores out to other responses, `refine best` gives all weight to the best of the G responses,
`refine no responses` takes the same steps with offline rows alone. {kept} rounds were kept."""
