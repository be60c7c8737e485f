use opentelemetry::{
    Context, KeyValue,
    trace::{Link, SpanKind, TraceContextExt, TraceId, TraceState},
};
use opentelemetry_sdk::trace::{Sampler, SamplingDecision, SamplingResult, ShouldSample};

/// A sampler that follows a parent, and where there is none, the links: a span for several events belongs to the traces
/// of all of them, and is sampled if one of these is. Otherwise a small ratio for new traces would leave it out of nearly
/// every trace that has it.
#[derive(Clone, Debug)]
pub(super) struct FollowLinks(pub(super) Sampler);

impl ShouldSample for FollowLinks {
    fn should_sample(
        &self,
        parent_context: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        span_kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let has_parent = parent_context.is_some_and(|cx| cx.span().span_context().is_valid());
        if has_parent || links.is_empty() {
            return self.0.should_sample(parent_context, trace_id, name, span_kind, attributes, links);
        }
        let decision = if links.iter().any(|link| link.span_context.is_sampled()) {
            SamplingDecision::RecordAndSample
        } else {
            SamplingDecision::Drop
        };
        SamplingResult { decision, attributes: Vec::new(), trace_state: TraceState::NONE }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::SpanContext;

    use super::*;

    #[test]
    fn a_span_without_a_parent_follows_its_links() {
        use Sampler::{AlwaysOff, AlwaysOn};

        let context = |flags: &str| {
            let text = format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-{flags}");
            outbox::trace::remote(&text).unwrap()
        };
        let (sampled, unsampled) = (context("01"), context("00"));
        let decision = |root: Sampler, parent: Option<&SpanContext>, links: &[&SpanContext]| {
            let follows = FollowLinks(Sampler::ParentBased(Box::new(root)));
            let parent = parent.map(|parent| Context::new().with_remote_span_context(parent.clone()));
            let links: Vec<Link> = links.iter().map(|&link| Link::with_context(link.clone())).collect();
            let kind = SpanKind::Consumer;
            let result =
                follows.should_sample(parent.as_ref(), sampled.trace_id(), "process", &kind, &[], &links);
            result.decision == SamplingDecision::RecordAndSample
        };
        assert!(decision(AlwaysOff, None, &[&unsampled, &sampled]));
        assert!(!decision(AlwaysOn, None, &[&unsampled]));
        assert!(decision(AlwaysOn, None, &[]) && !decision(AlwaysOff, None, &[]));
        assert!(!decision(AlwaysOn, Some(&unsampled), &[&sampled]));
        assert!(decision(AlwaysOff, Some(&sampled), &[&unsampled]));
    }
}
