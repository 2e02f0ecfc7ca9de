//! The testbed: real servers, planes as processes, faults; the demo and the bench
