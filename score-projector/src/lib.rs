//! score-projector
