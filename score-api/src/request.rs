//! The request, parsed once: whose score, and what it has to contain.

use std::{borrow::Cow, time::Duration};

use poem::Request;
use service::{
    config,
    problem::{FieldError, Problem},
};
use url::form_urlencoded;

use crate::{read_model::Cpf, token::Token};

/// What a reader asks.
pub(crate) struct Asked {
    pub(crate) cpf: Cpf,
    pub(crate) after: Option<After>,
}

/// What the answer has to contain, and how long the reader waits for it.
pub(crate) struct After {
    pub(crate) token: Token,
    pub(crate) wait: Duration,
}

/// Says all that is wrong at once. Parameters that are not known are refused: to ignore one that asks
/// for more would answer a question that nobody asked.
pub(crate) fn parse(request: &Request, max_wait: Duration) -> Result<Asked, Problem> {
    let cpf = request.raw_path_param("cpf").unwrap_or_default().parse::<Cpf>();
    let mut errors = Vec::new();
    if cpf.is_err() {
        errors.push(error("path: cpf", "must be a positive integer of at most 11 digits"));
    }
    let after = after(request.uri().query().unwrap_or_default(), max_wait, &mut errors);
    match cpf {
        Ok(cpf) if errors.is_empty() => Ok(Asked { cpf, after }),
        _ => Err(Problem {
            detail: "Correct what `errors` names and send the request again.".into(),
            ..Problem::invalid(errors)
        }),
    }
}

fn after(query: &str, max_wait: Duration, errors: &mut Vec<FieldError>) -> Option<After> {
    let (mut after, mut wait, mut others) = (Vec::new(), Vec::new(), false);
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*name {
            "after" => after.push(value),
            "wait" => wait.push(value),
            _ => others = true,
        }
    }
    let token = match &after[..] {
        [] if !wait.is_empty() => Err(error("query: after", "is required with `wait`")),
        [] => Ok(None),
        [token] => token.parse().map(Some).map_err(|()| {
            error("query: after", "must be the ETag of a write: a person's id, a dot, and a version")
        }),
        _ => Err(error("query: after", "is given more than once")),
    };
    let wait = match &wait[..] {
        [] => Ok(Duration::ZERO),
        [wait] => config::duration(wait).ok().filter(|wait| *wait <= max_wait).ok_or_else(|| {
            error("query: wait", format!("must look like 500ms or 2s and be at most {max_wait:?}"))
        }),
        _ => Err(error("query: wait", "is given more than once")),
    };
    let mut keep = |error| errors.push(error);
    let token = token.map_err(&mut keep);
    let wait = wait.map_err(&mut keep);
    if others {
        keep(error("query", "takes `after` and `wait` and nothing else"));
    }
    Some(After { token: token.ok().flatten()?, wait: wait.ok()? })
}

fn error(pointer: &'static str, detail: impl Into<Cow<'static, str>>) -> FieldError {
    FieldError { pointer: pointer.into(), detail: detail.into() }
}
