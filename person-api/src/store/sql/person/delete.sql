-- Deletes a person whose row is locked, with the event that ends the aggregate. The items go with the person, by the
-- foreign keys. Of the stored responses only the digests of their keys stay. A person with many rows is emptied
-- instead, and their rows are removed step by step afterwards (remove.sql).
--
-- Parameters: 1 the person's id, 2 how many rows are many, 3 headers of the event
-- or null.
WITH size AS MATERIALIZED (
    SELECT count(*) >= $2 AS many FROM (
        (SELECT FROM person.income WHERE person_id = $1 LIMIT $2) UNION ALL
        (SELECT FROM person.asset WHERE person_id = $1 LIMIT $2) UNION ALL
        (SELECT FROM person.debt WHERE person_id = $1 LIMIT $2) UNION ALL
        (SELECT FROM person.idempotency WHERE person_id = $1 LIMIT $2)) counted
), spent AS (
    UPDATE person.idempotency SET
        caller = '', route = '', key = encode(person.key_digest(caller, route, key), 'hex'),
        request = '', person_id = NULL, location = '', etag = '', body = ''
    WHERE person_id = $1 AND NOT (SELECT many FROM size)
), gone AS (
    DELETE FROM person.person WHERE id = $1 AND NOT (SELECT many FROM size) RETURNING id, version + 1 AS version
), emptied AS (
    UPDATE person.person
    SET cpf = NULL, name = '', address = NULL, date_of_birth = 'epoch', version = version + 1
    WHERE id = $1 AND (SELECT many FROM size) RETURNING id, version
), person AS (
    SELECT id, version FROM gone UNION ALL SELECT id, version FROM emptied
), event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
    SELECT 'person', id::text, version, 'person.deleted', (SELECT row_to_json(body) FROM (SELECT id) body),
           $3::jsonb
    FROM person
    RETURNING position
)
-- The division is the guard that no write is stored without its event, as in add.sql.
SELECT version, 1 / (SELECT count(*) FROM event) AS whole FROM person
