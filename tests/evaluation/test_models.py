"""Losses and responses of models: what TRL computes, whatever the batches."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from trl_bilevel import BilevelSFTTrainer
from trl_bilevel.evaluation import models
from trl_bilevel.evaluation.judges import find_judge, verdicts
from trl_bilevel.evaluation.report import kept_rows, loss_difference, loss_figures
from trl_bilevel.evaluation.rows import Row, assistant, encode, read_rows, user

LOAD = {"dtype": "float32"}


def chats(rows):
    return [{"prompt": user(row["prompt"].strip()), "completion": assistant(row["completion"])} for row in rows]


@pytest.mark.parametrize("chat", [False, True])
def test_losses_are_those_of_the_trainer(chat, rows, tiny_model, tokenizer, config, settings):
    rows = chats(rows[:20]) if chat else rows[:20]
    model = tiny_model()
    trainer = BilevelSFTTrainer(
        model, config(weight_estimator="none"), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    expected = trainer.row_losses(Dataset.from_list(rows))
    found = models.losses(model, tokenizer, read_rows(rows), settings)
    np.testing.assert_allclose(found.sums / found.counts, expected.numpy(), rtol=1e-5)


def test_losses_row_by_row_and_in_any_batch(rows, tiny_model, tokenizer, settings):
    model, read = tiny_model().eval(), read_rows(rows[:7])
    found = models.losses(model, tokenizer, read, settings)
    for number, row in enumerate(read):
        tokens = encode(row, tokenizer, {})
        ids = torch.tensor([tokens["input_ids"]])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        scored = log_probs[torch.tensor(tokens["labels"][1:]) != -100]
        assert found.sums[number] == pytest.approx(-scored.sum().item(), rel=1e-5)
        assert found.counts[number] == len(scored)
        assert found.sizes[number] == len(row.completion.encode())
    settings.batch_size = 1
    np.testing.assert_allclose(models.losses(model, tokenizer, read, settings).sums, found.sums, rtol=1e-5)


def test_rows_without_a_token_to_score(tiny_model, tokenizer, settings):
    settings.max_length = 6
    long, short = Row("word " * 20, "answer"), Row("a", "answer")
    found = models.losses(tiny_model(), tokenizer, [long, short], settings)
    assert found.counts.tolist()[0] == 0 < found.counts.tolist()[1] and found.cut == 1
    assert kept_rows([found]).tolist() == [False, True]
    only = models.losses(tiny_model(), tokenizer, [long], settings)
    with pytest.raises(ValueError, match="No row has a token to score"):
        kept_rows([only])


def test_figures_of_losses():
    found = models.Losses(np.array([2.0, 30.0]), np.array([1.0, 10.0]), np.array([4.0, 40.0]), "t", 0)
    figures = loss_figures(found, np.array([True, True]), resamples=99)
    assert figures["loss_row_mean"].value == 2.5
    assert figures["loss_per_token"].value == pytest.approx(32 / 11)
    assert figures["perplexity"].value == pytest.approx(np.exp(32 / 11))
    assert figures["loss_per_byte"].value == pytest.approx(32 / 44)


def test_other_tokens_are_compared_per_byte():
    kept = np.array([True, True])
    first = models.Losses(np.array([2.0, 6.0]), np.array([1.0, 2.0]), np.array([4.0, 4.0]), "one", 0)
    second = models.Losses(np.array([4.0, 6.0]), np.array([8.0, 8.0]), np.array([4.0, 4.0]), "two", 0)
    found = loss_difference([first, second], kept, resamples=99)
    assert found.keys() == {"loss_row_mean_per_byte"}
    assert found["loss_row_mean_per_byte"].value == pytest.approx(-0.25)
    second.tokens = "one"
    found = loss_difference([first, second], kept, resamples=99)
    assert found.keys() == {"loss_row_mean"} and found["loss_row_mean"].value == pytest.approx(2.5 - 0.625)


def test_an_adapter_answers_as_its_merged_model(folder, settings, tokenizer):
    model, found_tokenizer = models.load_model(str(folder / "adapter"), LOAD)
    # The adapter's folder has no tokenizer: the base model's is taken.
    assert isinstance(model, PeftModel) and found_tokenizer.chat_template
    rows = read_rows([{"prompt": user("a"), "completion": assistant("Return the length of an object.")}])
    adapted = models.losses(model, tokenizer, rows, settings).sums
    base = models.losses(models.load_model(str(folder / "model"), LOAD)[0], tokenizer, rows, settings).sums
    merged = models.losses(model.merge_and_unload(), tokenizer, rows, settings).sums
    assert merged == pytest.approx(adapted, rel=1e-5) and abs(base - adapted).item() > 1e-3


def test_responses_do_not_depend_on_batches_and_come_in_order(tiny_model, tokenizer, settings):
    prompts = [user("word " * n) for n in (1, 9, 4, 2, 7)]
    model = tiny_model()
    together = models.responses(model, tokenizer, prompts, settings)
    settings.batch_size = 1
    alone = [models.responses(model, tokenizer, [prompt], settings)[0] for prompt in prompts]
    assert together == alone and len(set(together)) > 1


def test_sampled_responses_follow_the_seed(tiny_model, tokenizer, settings):
    settings.temperature = 1.0
    model, prompts = tiny_model(), [user("a"), user("b")]
    first = models.responses(model, tokenizer, prompts, settings)
    assert first == models.responses(model, tokenizer, prompts, settings)
    settings.seed = 1
    assert first != models.responses(model, tokenizer, prompts, settings)


def test_thoughts_are_cut_off(tiny_model, tokenizer, settings, monkeypatch):
    said = ["I cannot.\n</think>\n\nSure.", "No thought"]
    monkeypatch.setattr(tokenizer, "batch_decode", lambda *args, **kwargs: said)
    assert models.responses(tiny_model(), tokenizer, [user("aa"), user("b")], settings) == ["Sure.", "No thought"]


def test_a_model_that_is_not_there(settings):
    with pytest.raises(ValueError, match="Could not load the model 'no/such-model'"):
        models.load_model("no/such-model", LOAD)


ROWS = [Row(user(f"Question {n}"), assistant("Return the length of an object.")) for n in range(6)]


def test_a_reward_model_scores_prompt_and_response(folder, settings, tokenizer):
    judge = find_judge(f"reward:{folder}/reward", settings)()
    responses = [f"Answer {'long ' * n}" for n in range(6)]
    scores = judge.score(ROWS, responses)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    chat = [*ROWS[3].prompt, *assistant(responses[3])]
    inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        assert scores[3] == pytest.approx(model(**inputs).logits.item(), rel=1e-4)
    # As if each order had been asked.
    others = responses[::-1]
    forward, backward = verdicts(judge, ROWS, responses, others)
    assert {*forward} == {0, 1}
    assert (backward, forward) == verdicts(judge, ROWS, others, responses)
    assert verdicts(judge, ROWS, responses, responses) == ([-1] * 6, [-1] * 6)


def test_a_reward_model_without_a_template_reads_pairs_of_texts(folder, settings, tokenizer):
    judge = find_judge(f"reward:{folder}/reward", settings)()
    judge.tokenizer.chat_template = None
    responses = [f"Answer {n}" for n in range(6)]
    inputs = tokenizer("Question 2", "Answer 2", return_tensors="pt")
    with torch.no_grad():
        expected = judge.classify.model(**inputs.to(judge.classify.model.device)).logits.item()
    assert judge.score(ROWS, responses)[2] == pytest.approx(expected, rel=1e-4)


def test_a_classifier_is_no_reward_model(folder, settings, tmp_path, tiny_model):
    model = tiny_model()
    model.config.num_labels = 3
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 3 outputs, not one"):
        find_judge(f"reward:{tmp_path}", settings)
