"""Distillation methods: one small module each, found without being listed anywhere."""
