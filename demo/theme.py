"""How the demo looks. No font or script comes from elsewhere: it works offline and tells nobody of its users."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import gradio as gr


def theme() -> Any:
    """Gradio's soft theme in our colours, with the reader's own system font."""
    fonts = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    return gr.themes.Soft(
        primary_hue="violet", secondary_hue="violet", neutral_hue="slate", radius_size="lg", font=fonts, font_mono=mono
    ).set(
        body_background_fill="#f6f6fb",
        body_background_fill_dark="#0b0f19",
        button_primary_background_fill="linear-gradient(90deg, #7c3aed, #c026d3)",
        button_primary_background_fill_hover="linear-gradient(90deg, #6d28d9, #a21caf)",
        button_primary_background_fill_dark="linear-gradient(90deg, #7c3aed, #c026d3)",
        button_primary_background_fill_hover_dark="linear-gradient(90deg, #8b5cf6, #d946ef)",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        block_border_width="1px",
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="600",
        block_title_padding="0",
        block_label_background_fill="*block_background_fill",
        block_label_background_fill_dark="*block_background_fill",
        block_label_text_color="*body_text_color_subdued",
        block_label_text_color_dark="*body_text_color_subdued",
        block_label_text_weight="500",
        block_label_text_size="*text_sm",
        checkbox_label_background_fill="*background_fill_secondary",
        checkbox_label_background_fill_selected="*primary_600",
        checkbox_label_shadow="none",
        block_shadow="0 1px 2px rgb(15 23 42 / 6%)",
    )


def css() -> str:
    """The page's own style sheet."""
    return (files("idgen.demo") / "style.css").read_text(encoding="utf-8")
