//! The control plane: configuration, credentials, the store, discovery
