"""From a model's torch module to an artifact: the Relax dialect, its passes and the build."""
