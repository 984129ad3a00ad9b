"""The app: what git logs say, per organisation."""
