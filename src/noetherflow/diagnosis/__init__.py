"""What a measurement or a run says in plain words: findings, each from one small rule with an argued threshold.

`finding.py` says what a finding is; the rules stand in `norms.py`, `decay.py`, `balance.py`, `heads.py`,
`stability.py`, `long_steps.py`, `losses.py`, `sampling.py` and `breaking.py` and read the facts of `facts.py`;
`of_model.py` and `parts.py` take these facts from a measurement, `of_run.py` from a ledger's log.
"""
