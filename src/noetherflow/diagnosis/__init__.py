"""What a measurement or a run says in plain words: findings, each from one small rule with an argued threshold.

`finding.py` says what a finding is; the rules stand in `norms.py`, `balance.py`, `stability.py`, `sampling.py` and
`breaking.py` and read the facts of `facts.py`; `of_model.py` takes these facts from a measurement, `of_run.py` from a
ledger's log.
"""
