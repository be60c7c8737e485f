/// Why a message is stored in `inbox.rejected`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rejection {
    Malformed,
    Fork,
    /// Its source is not followed.
    Foreign,
    /// Its source is followed, and published by another user.
    WrongUser,
    /// Its source has gone on to a later incarnation.
    Superseded,
    /// Its incarnation does not follow the newest known one.
    Unrelated,
}

impl Rejection {
    pub(crate) const ALL: [Self; 6] =
        [Self::Malformed, Self::Fork, Self::Foreign, Self::WrongUser, Self::Superseded, Self::Unrelated];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Fork => "fork",
            Self::Foreign => "foreign",
            Self::WrongUser => "wrong-user",
            Self::Superseded => "superseded",
            Self::Unrelated => "unrelated",
        }
    }
}

/// The detail of the row that counts messages above the limit of stored ones.
pub(crate) const NOT_KEPT: &str =
    "not kept, only counted: as many messages were rejected for this reason as are kept";
