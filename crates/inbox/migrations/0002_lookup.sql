-- Reading the inbox without knowing who published.

-- Finds an aggregate by its id alone: for a reader who holds a token of it ("does this contain my
-- write?"), and for an operator. The key begins with consumer and source, so it could only be scanned.
-- It costs an entry when an aggregate is first heard of; raising a version leaves it alone (HOT).
CREATE INDEX aggregate_id ON inbox.aggregate (aggregate_id);

-- What a reader of a read model needs and no more: how far it has come. No bodies.
CREATE FUNCTION inbox.grant_reader(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA inbox TO %s', role);
    EXECUTE format('GRANT SELECT ON inbox.migration, inbox.aggregate TO %s', role);
END
$$;
