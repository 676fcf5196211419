"""File formats and splits that data sources share; no module here is a source itself."""
