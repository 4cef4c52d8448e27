"""The benchmarks as lm-eval tasks: `lm_eval --include_path benchmarks/tasks --tasks gsm8k …` runs them without the bench.

Plain lm-eval needs `--apply_chat_template` for them, but not for the tasks in `_base`, whose few-shot prompts are for models that
only continue text, and `--confirm_run_unsafe_code` for the tasks with code.
"""
