-- Deletes an item of a person (kind: income). The event has the item as it was.
--
-- Parameters: 1 cpf, 2 id, 3 and 4 ids and versions of `If-Match` (null for any), 5 headers of the event or
-- null.
WITH target AS MATERIALIZED (
    SELECT * FROM person.person WHERE cpf = $1 FOR UPDATE
), stored AS MATERIALIZED (
    SELECT * FROM person.income WHERE id = $2 AND person_id = (SELECT id FROM target) FOR UPDATE
), person AS (
    UPDATE person.person SET version = target.version + 1
    FROM target, stored
    WHERE person.id = target.id
      AND ($3::uuid[] IS NULL OR (target.id, target.version) IN (SELECT * FROM unnest($3::uuid[], $4::bigint[])))
    RETURNING person.*
), item AS (
    DELETE FROM person.income USING person WHERE income.id = $2 AND income.person_id = person.id
    RETURNING income.*
), event AS (
    INSERT INTO outbox.event (aggregate_type, aggregate_id, version, type, payload, headers)
    SELECT 'person', person.id::text, person.version, 'income.deleted',
           (SELECT row_to_json(body)
            FROM (SELECT item.id, item.person_id,
                         item.type, -- not of a debt
                         trim_scale(item.value) AS value, item.created_at,
                         (SELECT row_to_json(body)
                          FROM (SELECT person.id, person.cpf, person.name, person.address, person.date_of_birth,
                                       person.created_at, person.status) body) AS person) body),
           $5::jsonb
    FROM person, item
    RETURNING position
)
-- The division is the guard that no write is stored without its event, as in add.sql.
SELECT target.id, target.version, stored.id AS item,
       ($3::uuid[] IS NULL
        OR (target.id, target.version) IN (SELECT * FROM unnest($3::uuid[], $4::bigint[]))) AS matches,
       person.version AS changed,
       1 / ((SELECT count(*) FROM event) = (SELECT count(*) FROM person))::int AS whole
FROM target LEFT JOIN stored ON true LEFT JOIN person ON true
