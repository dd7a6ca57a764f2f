"""Program -> JSON (source of truth) -> DOT and SVG."""
