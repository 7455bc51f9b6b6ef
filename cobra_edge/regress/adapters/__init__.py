"""Public benchmark harnesses, with a bundle as the model.

`model_adapter` answers their requests with a session, `generation_args` parses their generation options. `lm_eval` and
`lmms_eval` are the model classes that the two libraries register, `lm_eval_command` and `lmms_eval_command` the commands;
`task_names`, `harness_command` and `report` are shared by both.
"""
