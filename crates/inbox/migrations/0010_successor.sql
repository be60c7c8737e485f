-- A consumer whose read model was built again goes on under another name. Whoever asks for it by the old one gets
-- the one that has taken its place.
CREATE TABLE inbox.successor (
    consumer    text        PRIMARY KEY,
    replaced_by text        NOT NULL CHECK (replaced_by <> consumer),
    replaced_at timestamptz NOT NULL DEFAULT now()
);

-- The consumer that goes by this name now: itself, or the last of those that have replaced it. With its owner's
-- rights, so that whoever may use the schema may ask; there is nothing in it but names.
CREATE FUNCTION inbox.current_consumer(name text) RETURNS text
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE chain AS (
        SELECT name AS consumer, 0 AS n
        UNION ALL
        SELECT s.replaced_by, c.n + 1
        FROM chain c JOIN inbox.successor s ON s.consumer = c.consumer
        WHERE c.n < 1000)
    SELECT c.consumer FROM chain c ORDER BY c.n DESC LIMIT 1
$$;
