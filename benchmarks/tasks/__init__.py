"""The benchmarks as lm-eval tasks: `lm_eval --include_path benchmarks/tasks --tasks gsm8k …` runs them without the bench."""
