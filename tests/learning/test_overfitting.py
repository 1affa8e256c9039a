from __future__ import annotations

from distrain.learning.overfitting import Look, overfitting


def looks(validation: list[float], training: list[float]) -> list[Look]:
    return [Look(10 * (i + 1), t, v) for i, (v, t) in enumerate(zip(validation, training, strict=True))]


def test_validation_that_turns_while_training_goes_on_is_said():
    said = overfitting(looks([1.0, 0.5, 0.6, 0.7, 0.8], [1.0, 0.5, 0.4, 0.3, 0.2]))
    assert said is not None
    assert "since step 20: validation loss rose from 0.5 to 0.8 while training loss fell from 0.5 to 0.2" in said


def test_what_is_not_overfitting_is_not_called_so():
    falling = [1.0, 0.5, 0.4, 0.3, 0.2]
    assert overfitting(looks(falling, falling)) is None
    assert overfitting(looks([1.0, 0.5, 0.6, 0.7, 0.8], [1.0, 0.5, 0.6, 0.7, 0.8])) is None, "training got worse too"
    assert overfitting(looks([1.0, 0.5, 0.501, 0.502, 0.503], falling)) is None, "a level, not a turn"
    assert overfitting(looks([1.0, 0.9, 0.5, 0.7, 0.8], falling)) is None, "too soon to tell"
    assert overfitting([]) is None
