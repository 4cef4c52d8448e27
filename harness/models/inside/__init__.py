"""What runs inside vLLM's process, perhaps in another environment: standard library, torch and vLLM, and two files of ours by path."""
