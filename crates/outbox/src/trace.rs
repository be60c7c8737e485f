//! The trace that an event continues (W3C Trace Context), as its header `traceparent` names it.

#[cfg(feature = "opentelemetry")]
mod context {
    use opentelemetry::{
        Context, SpanId, TraceFlags, TraceId,
        trace::{SpanContext, TraceContextExt, TraceState},
    };

    /// The length of version 00. A later version may be longer.
    const LENGTH: usize = 55;

    /// The `traceparent` of the current context; none outside of a trace.
    ///
    /// ```
    /// assert_eq!(outbox::trace::current(), None);
    /// ```
    pub fn current() -> Option<String> {
        Context::map_current(|context| header(context.span().span_context()))
    }

    /// The `traceparent` of a span; none outside of a trace.
    pub fn header(span: &SpanContext) -> Option<String> {
        let flags = u8::from(span.is_sampled());
        span.is_valid().then(|| format!("00-{}-{}-{flags:02x}", span.trace_id(), span.span_id()))
    }

    /// The span that a `traceparent` names. None if the text is malformed, which is no error, and none if an id looks like
    /// a number, which could be a person's: a trace id without a letter, or a span id of five zeros and digits. Chance
    /// makes hardly any.
    ///
    /// ```
    /// use outbox::trace::remote;
    ///
    /// let span = remote("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").ok_or("malformed")?;
    /// assert!(span.is_sampled() && span.is_remote());
    /// assert_eq!(remote("00-0af7651916cd43dd8448eb211c80319c"), None);
    /// # Ok::<(), &str>(())
    /// ```
    pub fn remote(traceparent: &str) -> Option<SpanContext> {
        let flags = flags(traceparent)?;
        let bytes = traceparent.as_bytes();
        let separated = [2, 35, 52].into_iter().all(|at| bytes.get(at) == Some(&b'-'));
        let (version, trace, span) =
            (traceparent.get(..2)?, traceparent.get(3..35)?, traceparent.get(36..52)?);
        let hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let sane = separated && hex(version) && version != "ff" && hex(trace) && hex(span);
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        let number = digits(trace) || span.starts_with("00000") && digits(span);
        if !sane || number || version == "00" && bytes.len() > LENGTH {
            return None;
        }
        let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
        let flags = TraceFlags::new(flags) & TraceFlags::SAMPLED;
        Some(SpanContext::new(trace, span, flags, true, TraceState::NONE)).filter(SpanContext::is_valid)
    }

    /// As [`remote`], of a sampled span alone. Of an unsampled one, it looks at two bytes.
    pub fn sampled(traceparent: &str) -> Option<SpanContext> {
        if flags(traceparent)? & 1 == 0 { None } else { remote(traceparent) }
    }

    /// The flags: what follows them belongs to a later version.
    fn flags(traceparent: &str) -> Option<u8> {
        let bytes = traceparent.as_bytes();
        let digit = |at: usize| match bytes.get(at) {
            Some(digit @ b'0'..=b'9') => Some(digit - b'0'),
            Some(letter @ b'a'..=b'f') => Some(letter - b'a' + 10),
            _ => None,
        };
        let ends = matches!(bytes.get(LENGTH), None | Some(b'-'));
        Some(digit(LENGTH - 2)? << 4 | digit(LENGTH - 1)?).filter(|_| ends)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

        #[test]
        fn a_traceparent_is_read_as_it_is_written() {
            let span = remote(SAMPLED).unwrap();
            assert_eq!(header(&span).as_deref(), Some(SAMPLED));
            assert_eq!(sampled(SAMPLED), Some(span));
            // Other flags are of no interest here; bits of later versions are dropped.
            for (flags, is_sampled) in
                [("00", false), ("01", true), ("02", false), ("03", true), ("fe", false)]
            {
                let text = SAMPLED.replace("-01", &format!("-{flags}"));
                assert_eq!(remote(&text).unwrap().is_sampled(), is_sampled, "{flags}");
                assert_eq!(sampled(&text).is_some(), is_sampled, "{flags}");
            }
            let later = format!("01-{}-later", &SAMPLED[3..]);
            assert_eq!(remote(&later), remote(SAMPLED));
        }

        #[test]
        fn a_malformed_traceparent_is_ignored() {
            let id = "0af7651916cd43dd8448eb211c80319c";
            for text in [
                "",
                "00",
                "00-12345678909",
                &SAMPLED[..54],
                &format!("{SAMPLED}-more"),
                &format!("{SAMPLED}0"),
                &format!("ff-{}", &SAMPLED[3..]),
                &format!("0x-{}", &SAMPLED[3..]),
                &SAMPLED.to_uppercase(),
                &SAMPLED.replace(id, &id.to_uppercase()),
                &SAMPLED.replace("-01", "_01"),
                &SAMPLED.replace("-01", "-0g"),
                &SAMPLED.replace("b7ad6b7169203331", "0000000000000000"),
                &SAMPLED.replace(id, "00000000000000000000000000000000"),
                &SAMPLED.replace(id, "00000000000000000000052998224725"),
                &SAMPLED.replace("b7ad6b7169203331", "0000052998224725"),
                &SAMPLED.replace("0af7", "é7"),
                &"é".repeat(28),
            ] {
                assert_eq!(remote(text), None, "{text}");
                assert_eq!(sampled(text), None, "{text}");
            }
        }
    }
}

#[cfg(feature = "opentelemetry")]
pub use context::{current, header, remote, sampled};

/// None: without the feature `opentelemetry` there are no traces.
#[cfg(not(feature = "opentelemetry"))]
pub(crate) fn current() -> Option<String> {
    None
}
