//! Tracing, metrics, redaction and field names
