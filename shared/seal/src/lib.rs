//! Envelope encryption: sealed records, tenant keys, key sources
