"""Records and what people read of them: tables, figures, the HTML page. Never imports torch."""
