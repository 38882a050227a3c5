"""``glm4-deploy`` and ``python -m glm4_deploy``. Installs signal handlers before any other import."""

from glm4_deploy import interrupts

interrupts.exit_at_once()

from glm4_deploy.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
