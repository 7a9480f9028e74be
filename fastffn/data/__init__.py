"""Text and tasks: what models are distilled, searched and judged on."""
