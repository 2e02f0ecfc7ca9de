//! What the repository's commands and the testbed share: the installer of servers and tools.

pub mod tools;
