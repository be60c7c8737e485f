-- Removes a part of the rows of a person who was emptied, and returns how many it removed.
--
-- Parameters: 1 the person's id, 2 the largest number of rows of each table.
WITH income AS (
    DELETE FROM person.income
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM person.income WHERE person_id = $1 LIMIT $2)) RETURNING 1
), asset AS (
    DELETE FROM person.asset
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM person.asset WHERE person_id = $1 LIMIT $2)) RETURNING 1
), debt AS (
    DELETE FROM person.debt
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM person.debt WHERE person_id = $1 LIMIT $2)) RETURNING 1
), spent AS (
    UPDATE person.idempotency SET
        caller = '', route = '', key = encode(person.key_digest(caller, route, key), 'hex'),
        request = '', person_id = NULL, location = '', etag = '', body = ''
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM person.idempotency WHERE person_id = $1 LIMIT $2 FOR UPDATE)) RETURNING 1
)
SELECT (SELECT count(*) FROM income) + (SELECT count(*) FROM asset) + (SELECT count(*) FROM debt)
       + (SELECT count(*) FROM spent)
