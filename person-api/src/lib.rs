//! person-api
