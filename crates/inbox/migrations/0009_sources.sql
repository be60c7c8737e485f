-- Who published it: a consumer that is told its sources and their users keeps what is not from them here.
--   foreign     its source is none of those that are followed.
--   wrong-user  its source is followed, but another user of the broker published it than those that may, or
--               none is named: it is forged, or the publisher's user was renamed.
ALTER TABLE inbox.rejected DROP CONSTRAINT rejected_reason_check;
ALTER TABLE inbox.rejected ADD CONSTRAINT rejected_reason_check
    CHECK (reason IN ('malformed', 'fork', 'foreign', 'wrong-user'));
