//! Adapters to the stores that ScaiVault fronts
