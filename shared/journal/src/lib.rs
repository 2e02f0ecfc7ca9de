//! The audit journal: rows on disk before values leave, and hash-chained segments
