"""Public benchmark harnesses, with a bundle as the model.

`examinee` puts their questions to a session, `writing` reads what they ask of an answer; `lm_eval` and `lmms_eval` are the
model classes that the two libraries know, `lm_eval_verb` and `lmms_eval_verb` the commands, `task_names`, `harness_verb` and
`report` what those share.
"""
